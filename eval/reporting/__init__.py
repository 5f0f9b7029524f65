"""How numbers are shown: intervals, tables, plots, the html page."""
