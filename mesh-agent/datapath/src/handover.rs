//! A running device that goes over from one process to the next: on an upgrade with its sessions, after a crash with
//! its configuration.
//!
//! `state` is what there is to tell, `codec` how it is written, `transfer` the device's side of it, and `socket` the
//! conversation between two processes, which also carries the TUN and the sockets.

pub mod codec;
pub mod service;
pub mod socket;
pub mod state;
pub mod transfer;
