//! A lab of hosts and pods on one machine: real binaries, real packets, network namespaces.
//!
//! ```text
//!   host a (net+mount+pid+uts ns)            wire (net ns)               host b
//!   ┌──────────────────────────────┐                                ┌────────────────┐
//!   │ mesh-agent  mesh-datapath    │   port0 ┌───────────────┐ port1│                │
//!   │ pod netns ─veth─ margay0 ─ eth0 ──────▶│ bridge, or    │◀─────── eth0  …        │
//!   │ /run /etc/margay /sys/fs/bpf │         │ relay (lossy) │      │                │
//!   └──────────────────────────────┘         └───────────────┘      └────────────────┘
//! ```
//!
//! A host is one holder process: the init of its own PID namespace, which also owns the network, mount and UTS
//! namespaces. The holder ends when the lab's end of its control socket closes, and with it every process,
//! mount, pin, persistent TUN and namespace of the host: a lab killed at any moment leaves nothing.
//! The machine's own network namespace is never touched.

// The lab is all edge: it times out, measures and reads its environment everywhere.
#![allow(clippy::disallowed_methods)]

pub mod agent;
pub mod bench;
pub mod bins;
pub mod capture;
pub mod carrier;
pub mod cluster;
pub mod conformance;
pub mod control;
pub mod demo;
pub mod enter;
pub mod flow;
pub mod guest;
pub mod holder;
pub mod host;
pub mod http;
pub mod lab;
pub mod leaks;
pub mod manifests;
pub mod mounts;
pub mod netns;
pub mod out;
pub mod pods;
pub mod probe;
pub mod spec;
pub mod throughput;
pub mod wait;
pub mod wire;
