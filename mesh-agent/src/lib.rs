//! The control daemon: sources → snapshot → plan → reconcilers → status.
//!
//! `source` watches the outside, `snapshot` is all of it at one moment, `plan` turns it into `desired`
//! without touching anything, `reconcile` makes the kernel and the datapath so, `status` says how that went
//! and `api` tells it.

pub mod api;
pub mod cni;
pub mod config;
pub mod desired;
pub mod files;
pub mod ipam;
pub mod metrics;
pub mod names;
pub mod own;
pub mod plan;
pub mod reconcile;
pub mod snapshot;
pub mod source;
pub mod status;
pub mod store;
pub mod wireguard;
