"""Files of the hub and of the user: model folders in and out, complaints about them, command-line options."""
