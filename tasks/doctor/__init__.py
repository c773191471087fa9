"""One file per thing that must be right before a night's run; each check says what it found and how to mend it."""
