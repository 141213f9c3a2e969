"""tsdkd train: the student learns, offline from scores or online from a loaded teacher."""
