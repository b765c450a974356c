"""The sections of a report, one file each: `section(study)` gives it, or None where the study has nothing for it."""
