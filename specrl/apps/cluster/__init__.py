"""More than one machine, through Ray: studies, online learning, environments and offline learning."""
