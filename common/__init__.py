"""What every command shares: error lines and exit codes, files that are whole or absent, one writer a folder."""
