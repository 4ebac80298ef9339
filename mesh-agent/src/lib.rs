//! Margay.
