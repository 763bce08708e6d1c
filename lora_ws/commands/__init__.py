"""One thin function per command; its parameters are the command's flags."""
