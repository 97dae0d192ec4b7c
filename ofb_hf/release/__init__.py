"""What leaves the package: published checkpoints, their cards and stock twins, exported files."""
