//! The userspace WireGuard device.
//!
//! `device` is the core without I/O: packets and datagrams in, batches of both out, the time handed in. Packets pass
//! through `transmit` and `receive`, without a peer's lock; `handshakes` and `timers` make and end the `session`s of
//! each `peer` with the protocol core (`mesh-noise`). `gate` and `limiter` guard handshakes, `allowed_ips`, `index`
//! and `ip_packet` are tables and parsers, `counters` says what was dropped and why.
//! `engine` runs a core on real devices: `tun`, `udp`, and `server` for WireGuard's UAPI. `offload` cuts and joins
//! the large packets of the TUN.
//! `handover` passes a device to the next process. `process` is daemonising, privileges and readiness.

pub mod allowed_ips;
pub mod batch;
pub mod configure;
pub mod counters;
pub mod device;
pub mod engine;
pub mod gate;
pub mod handover;
pub mod handshakes;
pub mod index;
pub mod ip_packet;
pub mod limiter;
pub mod offload;
pub mod outbox;
pub mod peer;
pub mod process;
pub mod receive;
pub mod server;
pub mod session;
pub mod timers;
pub mod transmit;
pub mod tun;
pub mod udp;

pub use device::Device;
