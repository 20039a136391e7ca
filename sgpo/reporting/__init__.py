"""What people look at: log files, the live display, plots and HTML pages."""
