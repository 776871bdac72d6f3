"""One file each: the loop from top to bottom, its mathematics called from taurl.functional."""
