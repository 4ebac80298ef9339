//! The userspace WireGuard device.
//!
//! `device` is the core without I/O: packets and datagrams in, batches of both out, the time handed in. Below
//! it, `peer` (out), `receive` (in) and `timers` wrap one tunnel of the protocol core (boringtun's `noise::Tunn`)
//! and add what that leaves to its caller; `gate` and `limiter` guard handshakes, `allowed_ips`, `index` and
//! `ip_packet` are its tables and parsers, `counters` says what was dropped and why.
//! `engine` runs a core on real devices: `tun`, `udp`, and `server` for WireGuard's UAPI. `offload` cuts and joins
//! the large packets of the TUN.
//! `process` is daemonising, privileges and readiness.

pub mod allowed_ips;
pub mod batch;
pub mod configure;
pub mod counters;
pub mod device;
pub mod engine;
pub mod gate;
pub mod index;
pub mod ip_packet;
pub mod limiter;
pub mod offload;
pub mod peer;
pub mod process;
pub mod receive;
pub mod server;
pub mod timers;
pub mod tun;
pub mod udp;

pub use device::Device;
