"""Looking at sets that exist: statistics, verification, repair, contact sheets."""
