"""What lies on disk: files, results by content, runs."""
