"""msif beside other libraries, each in an environment of its own (install.sh makes them)."""
