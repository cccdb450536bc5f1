"""What commands read and write: options, tables, output directories and progress."""
