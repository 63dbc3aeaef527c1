"""The same study on many machines: pieces of work, and those who share them out."""
