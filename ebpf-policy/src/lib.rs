//! What may talk: Kubernetes NetworkPolicy compiled to compact maps and enforced by BPF programs on each pod's host-side veth.
//!
//! The flow is [`model::ClusterView`] → [`compile()`] → [`Compiled`] → [`Enforcer::apply`]. [`reference`] is the slow, obvious
//! evaluator that everything else is tested against; the verdict itself lives in the `margay-bpf` package, which compiles for
//! the kernel and for this crate's tests alike.

pub mod compile;
pub mod enforcer;
pub mod model;
mod select;

pub use compile::{Compiled, compile};
pub use enforcer::{ApplyReport, Enforcer, Error, Options};
