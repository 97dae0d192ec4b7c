"""What leaves the house: folders for the Hub, cards, exported files."""
