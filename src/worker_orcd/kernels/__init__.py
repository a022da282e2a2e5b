"""Device operations behind one Backend protocol. One package a device; devices do not know each other."""
