"""Plans become files: tiles, writer, journal, the place where output goes."""
