"""The tiers below RAM: where blocks live that the arena has no room for."""
