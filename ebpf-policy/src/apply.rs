//! Bringing the maps to what was compiled, with nothing open in between.
//!
//! Entries of sets and tables never change their meaning, so new ones are written before anything names them and old ones are
//! removed after nothing does. Endpoints and addresses are switched one by one, each in one atomic step: at every moment a packet
//! is judged by the old or by the new policy, or is denied. Last the revision moves on, and live connections are judged again.

use margay_bpf::layout::{
    Addr, Address, Config, Decision, Endpoint, IdentityId, LAYOUT_VERSION, ServiceKey, SetKey, TableId,
};

use crate::compile::{Compiled, Prefix, TablePrefix};
use crate::error::Error;
use crate::maps::Mirror;

/// What [`crate::Enforcer::apply`] changed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ApplyReport {
    /// Map entries written.
    pub written: usize,
    /// Map entries removed.
    pub removed: usize,
}

/// All maps that policy is made of.
pub(crate) struct State {
    pub(crate) config: Mirror<u32, Config>,
    pub(crate) endpoints: Mirror<u32, Endpoint>,
    pub(crate) addresses: Mirror<Addr, Address>,
    pub(crate) prefixes: Mirror<Prefix, IdentityId>,
    pub(crate) sets: Mirror<SetKey, TableId>,
    pub(crate) tables: Mirror<TablePrefix, Decision>,
    pub(crate) services: Mirror<ServiceKey, u32>,
    pub(crate) ranges: Mirror<Prefix, u32>,
    /// Something may have changed since the revision last moved on: true at first, since an earlier agent may have died between
    /// the two.
    pub(crate) unsettled: bool,
}

impl State {
    /// Makes the maps hold what was compiled. After a failure every endpoint is closed rather than left with half a policy.
    pub(crate) fn apply(&mut self, wanted: &Compiled) -> Result<ApplyReport, Error> {
        self.switch(wanted).map_err(|error| {
            self.unsettled = true;
            match self.close(wanted) {
                Ok(closed) => Error::Closed { closed, source: Box::new(error) },
                Err(worse) => worse,
            }
        })
    }

    fn switch(&mut self, wanted: &Compiled) -> Result<ApplyReport, Error> {
        let mut report = ApplyReport::default();
        report.written += self.tables.write(&wanted.tables)?;
        report.written += self.sets.write(&wanted.sets)?;
        report.written += self.addresses.write(&wanted.addresses)?;
        report.written += self.prefixes.write(&wanted.prefixes)?;
        report.removed += self.prefixes.sweep(&wanted.prefixes)?;
        report.removed += self.addresses.sweep(&wanted.addresses)?;
        report.written += self.services.write(&wanted.services)?;
        report.removed += self.services.sweep(&wanted.services)?;
        report.written += self.ranges.write(&wanted.ranges)?;
        report.removed += self.ranges.sweep(&wanted.ranges)?;
        report.written += self.endpoints.write(&wanted.endpoints)?;
        report.removed += self.endpoints.sweep(&wanted.endpoints)?;
        if self.unsettled || report != ApplyReport::default() {
            self.advance()?;
            self.unsettled = false;
        }
        report.removed += self.sets.sweep(&wanted.sets)?;
        report.removed += self.tables.sweep(&wanted.tables)?;
        Ok(report)
    }

    /// Closes every endpoint, known or wanted. Endpoints' entries are preallocated: closing does not need memory.
    fn close(&mut self, wanted: &Compiled) -> Result<usize, Error> {
        let all: Vec<u32> = self.endpoints.current.keys().chain(wanted.endpoints.keys()).copied().collect();
        let closed = Endpoint { closed: 1, ..Endpoint::default() };
        for ifindex in &all {
            self.endpoints.put(*ifindex, closed)?;
        }
        self.advance()?;
        Ok(self.endpoints.current.len())
    }

    /// The policy's revision; connections judged under another one are judged again.
    fn advance(&mut self) -> Result<(), Error> {
        let revision = self.config.current.get(&0).map_or(0, |config| config.revision).wrapping_add(1);
        self.config.put(0, Config { layout: LAYOUT_VERSION, revision })
    }
}

#[cfg(test)]
mod tests;
