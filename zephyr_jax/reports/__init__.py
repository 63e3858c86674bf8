"""HTML reports and plots of runs, data and samples."""
