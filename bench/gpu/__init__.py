"""What measuring on a GPU takes: its clock, its driver's readings, and the checks of a machine that has one."""
