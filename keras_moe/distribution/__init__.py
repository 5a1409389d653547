"""Where experts live and how tokens travel, on several devices."""
