"""The ground floor of the package: random numbers, files, processes, signals, the machine, and words of messages."""
