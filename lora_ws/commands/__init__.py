"""One thin function a command; its parameters are the command's flags."""
