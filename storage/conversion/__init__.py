"""From images to pyramids: built in tasks, journalled, and whole before they have their name."""
