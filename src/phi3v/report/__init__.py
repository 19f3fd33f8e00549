"""What people look at: the report of runs and the preview of a data file, each one HTML file that needs nothing."""
