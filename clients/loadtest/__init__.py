"""`leasehold loadtest`: load with known timing, verified answers, and reports."""
