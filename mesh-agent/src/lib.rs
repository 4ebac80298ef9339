//! The control daemon: sources → snapshot → plan → reconcilers → status.
//!
//! `source` watches the outside, `snapshot` is all of it at one moment, `plan` turns it into `desired`
//! without touching anything, `reconcile` makes the kernel and the datapath so, `status` says how that went
//! and `api` tells it.

pub mod api;
pub mod cleanup;
pub mod cni;
pub mod config;
pub mod daemon;
pub mod desired;
pub mod files;
pub mod heal;
pub mod ipam;
pub mod kernel_events;
pub mod kubernetes;
pub mod learned;
pub mod memory;
pub mod metrics;
pub mod names;
pub mod notify;
pub mod observe;
pub mod own;
pub mod plan;
pub mod planner;
pub mod proc_sys;
pub mod reconcile;
pub mod rotate;
pub mod runner;
pub mod snapshot;
pub mod source;
pub mod state;
pub mod status;
pub mod store;
pub mod wireguard;
