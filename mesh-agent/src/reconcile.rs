//! Making the node so: each reconciler reads what is, compares it with what is desired over the union of
//! both, and applies the difference. Absent-on-delete and identical-on-add are success.
//!
//! The runner calls them one after the other in the order of [`Stage`], on a new generation, on a kernel
//! event and on a timer, and keeps the outcome of each for status.

use futures::future::BoxFuture;

use crate::desired::Desired;

pub mod addresses;
#[cfg(test)]
mod laws;
pub mod links;
pub mod masquerade;
pub mod neighbours;
pub mod netlink;
pub mod policy;
pub mod routes;
pub mod rules;
pub mod sysctls;
pub mod wireguard;

/// The order in which reconcilers run. Policy comes before anything that lets a packet through, the
/// unreachable fall-back before the routes it backs, a peer before the route to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Forwarding and reverse-path settings.
    Sysctls,
    /// Programs attached, maps filled: before routes open.
    Policy,
    /// Kernel WireGuard devices, MTU and up.
    Links,
    /// Addresses and permanent neighbours.
    Addresses,
    /// Keys, peers, allowed IPs.
    Wireguard,
    /// Routes, unreachable ones first in and last out.
    Routes,
    /// Policy-routing rules.
    Rules,
    /// nftables.
    Masquerade,
    /// Links of ours that nothing leads to any more.
    Leftovers,
}

/// What a pass did.
#[derive(Debug, Default)]
pub struct Report {
    /// Changes made; 0 when everything was as desired.
    pub operations: u64,
    /// Objects that could not be made so. The others were.
    pub errors: Vec<ReconcileError>,
}

impl Report {
    /// Counts one operation or keeps its error.
    pub fn record(&mut self, outcome: Result<(), ReconcileError>) {
        match outcome {
            Ok(()) => self.operations += 1,
            Err(error) => self.errors.push(error),
        }
    }
}

/// What failed: which object, and what the system said.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{object}: {message}")]
pub struct ReconcileError {
    /// `route 10.244.2.0/24 table 4207` …
    pub object: String,
    /// With errno where there is one.
    pub message: String,
}

impl ReconcileError {
    /// On `object`, for the reason `message`.
    pub fn new(object: impl std::fmt::Display, message: impl std::fmt::Display) -> Self {
        Self { object: object.to_string(), message: message.to_string() }
    }
}

/// One kind of state to keep.
pub trait Reconciler: Send {
    /// For status and logs, plural: `routes`.
    fn name(&self) -> &'static str;
    /// When it runs.
    fn stage(&self) -> Stage;
    /// One pass: read, diff, apply. `Err` when it could not even read; an object that could not be
    /// changed goes into the report and stops no other.
    fn reconcile<'a>(&'a mut self, desired: &'a Desired) -> BoxFuture<'a, Result<Report, ReconcileError>>;
}
