//! Runs the reconcilers, one after the other in the order of their stages: on a new plan, on a kernel
//! event, on a timer, and sooner while something is wrong.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use rand::Rng as _;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep_until};
use tracing::{info, warn};

use crate::desired::Desired;
use crate::reconcile::{ReconcileError, Reconciler, Report, Stage};
use crate::status::Board;

/// Everything is read again this often, event or not.
const RESYNC: Duration = Duration::from_secs(5);
/// First wait of a failed reconciler; it doubles with each failure.
const RETRY_FIRST: Duration = Duration::from_secs(1);
/// Longest wait of a failed reconciler.
const RETRY_LAST: Duration = Duration::from_secs(30);
/// How long kernel events are collected before they are looked at.
const DEBOUNCE: Duration = Duration::from_millis(50);

/// A reconciler and how it has been doing.
struct Row {
    reconciler: Box<dyn Reconciler>,
    failures: u32,
    /// When it may run again after a failure.
    retry: Option<Instant>,
    /// What was last said to the log.
    said: Option<String>,
}

/// Why a pass is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// A new plan.
    Plan,
    /// Something changed in the kernel, or a device appeared.
    Event,
    /// Time.
    Timer,
}

/// The reconcilers, and which links have their policy.
pub struct Runner {
    rows: Vec<Row>,
    board: Board,
    /// Links whose policy is in place, with their interface indices. A route to any other that policy names is withheld.
    policed: BTreeMap<String, u32>,
    /// Interface index of the link of this name, if there is one.
    index: fn(&str) -> Option<u32>,
}

impl Runner {
    /// Of these, in the order of their stages (of one stage, as given).
    pub fn new(mut reconcilers: Vec<Box<dyn Reconciler>>, board: Board) -> Self {
        reconcilers.sort_by_key(|reconciler| reconciler.stage());
        let row = |reconciler| Row { reconciler, failures: 0, retry: None, said: None };
        let index = |name: &str| nix::net::if_::if_nametoindex(name).ok();
        Self { rows: reconcilers.into_iter().map(row).collect(), board, policed: BTreeMap::new(), index }
    }

    /// Runs until the plans end.
    pub async fn run(mut self, mut plans: watch::Receiver<Arc<Desired>>, events: Arc<Notify>) {
        let mut quiet = DEBOUNCE;
        let mut resync = Instant::now() + RESYNC;
        let mut cause = Cause::Plan;
        plans.mark_unchanged();
        loop {
            let desired = plans.borrow_and_update().clone();
            let operations = self.pass(&desired, cause).await;
            quiet = next_quiet(quiet, cause, operations);
            if cause != Cause::Event {
                resync = Instant::now() + RESYNC;
            }
            let next = self.rows.iter().filter_map(|row| row.retry).min().unwrap_or(resync).min(resync);
            cause = tokio::select! {
                changed = plans.changed() => match changed {
                    Ok(()) => Cause::Plan,
                    Err(_) => return,
                },
                () = async { events.notified().await; tokio::time::sleep(quiet).await } => Cause::Event,
                () = sleep_until(next) => Cause::Timer,
            };
        }
    }

    /// One pass. Gives the number of operations.
    pub async fn pass(&mut self, desired: &Desired, cause: Cause) -> u64 {
        let mut desired = desired.clone();
        let named: BTreeSet<String> =
            desired.policy.endpoints.keys().chain(&desired.policy.tunnels).cloned().collect();
        // Policy is a link's, not its name's: one that is gone, or replaced, has to show it anew.
        let index = self.index;
        let present: BTreeMap<String, u32> =
            named.iter().filter_map(|link| Some((link.clone(), index(link)?))).collect();
        self.policed.retain(|link, at| present.get(link) == Some(at));
        let mut operations = 0;
        for row in &mut self.rows {
            if row.reconciler.stage() > Stage::Policy {
                // Links are made and replaced in the pass itself, after policy's turn.
                let policed =
                    |link: &String| index(link).is_some_and(|at| self.policed.get(link) == Some(&at));
                desired.withhold = named.iter().filter(|link| !policed(link)).cloned().collect();
            }
            if cause == Cause::Timer && row.retry.is_some_and(|retry| Instant::now() < retry) {
                continue;
            }
            let outcome = row.reconciler.reconcile(&desired).await;
            if row.reconciler.stage() == Stage::Policy {
                judge(&mut self.policed, &present, &outcome);
            }
            operations += outcome.as_ref().map_or(0, |report| report.operations);
            row.settle(&outcome);
            self.board.passed(row.reconciler.name(), desired.generation, &outcome);
        }
        operations
    }
}

impl Row {
    /// Notes when to try again, and says what changed.
    fn settle(&mut self, outcome: &Result<Report, ReconcileError>) {
        let name = self.reconciler.name();
        let errors = match outcome {
            Ok(report) => report.errors.as_slice(),
            Err(error) => std::slice::from_ref(error),
        };
        if errors.is_empty() {
            (self.failures, self.retry) = (0, None);
            if self.said.take().is_some() {
                info!(reconciler = name, "works again");
            }
            return;
        }
        let wait = backoff(self.failures).mul_f64(rand::rng().random_range(0.8..1.2));
        self.failures = self.failures.saturating_add(1);
        self.retry = Some(Instant::now() + wait);
        let text = errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
        if self.said.as_ref() != Some(&text) {
            warn!(reconciler = name, "{text}");
            self.said = Some(text);
        }
    }
}

/// How long events are collected before the next pass. Our own changes come back as events, and a pass that
/// finds nothing to do ends that; passes that keep finding something (another program undoes what we do)
/// get further and further apart.
fn next_quiet(quiet: Duration, cause: Cause, operations: u64) -> Duration {
    match (cause, operations) {
        (Cause::Event, 1..) => (quiet * 2).min(RESYNC),
        _ => DEBOUNCE,
    }
}

/// How long to wait after the failure that follows `failures` others.
fn backoff(failures: u32) -> Duration {
    RETRY_FIRST.saturating_mul(1 << failures.min(5)).min(RETRY_LAST)
}

/// Which of the `present` links have their policy after this outcome. An error that names a link is that
/// link's alone; any other proves nothing new, and what was in place still is.
fn judge(
    policed: &mut BTreeMap<String, u32>,
    present: &BTreeMap<String, u32>,
    outcome: &Result<Report, ReconcileError>,
) {
    let Ok(report) = outcome else { return };
    let mut failed = BTreeSet::new();
    let mut of_all = false;
    for error in &report.errors {
        let named = present.keys().find(|link| error.object.split_whitespace().any(|word| word == *link));
        match named {
            Some(link) => drop(failed.insert(link.clone())),
            None => of_all = true,
        }
    }
    if !of_all {
        policed.extend(present.iter().map(|(link, at)| (link.clone(), *at)));
    }
    policed.retain(|link, _| !failed.contains(link));
}

#[cfg(test)]
mod tests;
