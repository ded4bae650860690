"""Run the programs of e2fsprogs."""
