"""What a network costs: multiply-accumulates, parameters, and milliseconds of one machine."""
