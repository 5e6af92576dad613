"""Run commands on a Ray cluster: submit them to one, or write the manifest of one that is made for a command."""
