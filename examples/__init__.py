"""Examples; a package, so that none of the same name that some other distribution installs is found in its place."""
