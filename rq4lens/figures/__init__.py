"""One drawing per question: results in, plotly figures out."""
