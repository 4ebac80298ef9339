//! WireGuard devices as the agent drives them: one trait, several implementations.
//!
//! `kernel` is WireGuard in the kernel, `userspace` talks to mesh-datapath (or any other program with WireGuard's UAPI),
//! `node` takes whichever a link is, and `memory` is a device that carries no packet. One conformance suite
//! (tests/datapath_conformance.rs) runs over all of them.

use futures::future::BoxFuture;
use mesh_uapi::{Device, Op};

pub mod kernel;
mod keyring;
mod live;
pub mod memory;
pub mod node;
pub mod userspace;

pub use kernel::{Kernel, KernelDatapath};
pub use keyring::KeyRing;
pub use live::Live;
pub use memory::MemoryDatapath;
pub use node::NodeDatapaths;
pub use userspace::{UserspaceDatapath, UserspaceDatapaths};

/// A request to a device that failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DatapathError {
    /// No such device, or nobody drives it.
    #[error("{0}")]
    Absent(String),
    /// It is there and refused, or broke off.
    #[error("{0}")]
    Failed(String),
}

/// One WireGuard device.
pub trait Datapath: Send + Sync {
    /// The device as it is, without its secrets.
    fn read(&self) -> BoxFuture<'_, Result<Device, DatapathError>>;
    /// Changes it, in order. A refused list may have been carried out in part; the next read tells.
    fn apply(&self, ops: Vec<Op>) -> BoxFuture<'_, Result<(), DatapathError>>;
    /// Counters beyond bytes; `None` when the implementation has none.
    fn stats(&self) -> BoxFuture<'_, Result<Option<mesh_uapi::Stats>, DatapathError>>;
}

/// Where devices are found.
pub trait Datapaths: Send + Sync {
    /// The device `name`, whether it exists or not.
    fn open(&self, name: &str) -> Box<dyn Datapath>;
    /// Names of the devices there are that are ours by name.
    fn names(&self) -> Vec<String>;
}
