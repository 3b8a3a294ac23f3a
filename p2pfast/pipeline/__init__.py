"""From files to images: find and read inputs, run a network over them, write the results."""
