//! What may talk: Kubernetes NetworkPolicy compiled to compact maps and enforced by BPF programs on each pod's host-side veth.
//!
//! The flow is [`model::ClusterView`] → [`compile()`] → [`Compiled`] → [`Enforcer::apply`]. [`reference`] is the slow, obvious
//! evaluator that everything else is tested against; the verdict itself lives in the `margay-bpf` package, which compiles for
//! the kernel and for this crate's tests alike.

// The tests' generators name this crate from outside.
#[cfg(test)]
extern crate self as ebpf_policy;

mod apply;
mod attach;
pub mod compile;
mod enforcer;
mod error;
mod events;
mod maps;
pub mod model;
mod object;
mod pins;
pub mod reference;
mod select;
pub mod simulate;

pub use apply::ApplyReport;
pub use compile::{Compiled, compile};
pub use enforcer::{AttachMode, Attached, Enforcer, Framing, Options, Role};
pub use error::Error;
pub use events::{Counter, Event, Events};

/// Where the kernel judges a packet, and its verdict: for simulation.
pub use margay_bpf::{
    layout::{Reason, direction},
    verdict::{Hook, Verdict},
};
