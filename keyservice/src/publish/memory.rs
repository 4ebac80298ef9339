//! Announcing to other nodes in the same process, for tests: a bus that delays, loses and reorders.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rand::{Rng as _, RngCore};

use super::{Publish, PublishError, Published, check, check_name};
use crate::announcement::Announcement;

/// Annotations by node name, as one node sees them.
pub type View = BTreeMap<String, BTreeMap<String, String>>;

/// How badly the bus carries.
#[derive(Debug, Clone)]
pub struct Impairment {
    /// Each delivery takes a time drawn from here.
    pub delay: RangeInclusive<Duration>,
    /// Each delivery is lost with this probability, 0 to 1.
    pub loss: f64,
    /// Whether a delivery may overtake an earlier one of the same node to the same view, so that the
    /// older announcement has the last word.
    pub reorder: bool,
}

impl Default for Impairment {
    /// At once, all, in order.
    fn default() -> Self {
        Self { delay: Duration::ZERO..=Duration::ZERO, loss: 0.0, reorder: false }
    }
}

/// The bus; clones share it. Time is the time given to [`MemoryBus::advance`], since the bus began.
#[derive(Clone)]
pub struct MemoryBus(Arc<Mutex<State>>);

struct State {
    now: Duration,
    rng: Box<dyn RngCore + Send>,
    impairment: Impairment,
    sent: View,
    views: BTreeMap<String, View>,
    in_flight: Vec<Delivery>,
}

struct Delivery {
    due: Duration,
    to: String,
    node: String,
    /// `None` withdraws.
    annotations: Option<BTreeMap<String, String>>,
}

impl MemoryBus {
    /// A bus that draws its delays and losses from `rng`.
    pub fn new(impairment: Impairment, rng: impl RngCore + Send + 'static) -> Self {
        Self(Arc::new(Mutex::new(State {
            now: Duration::ZERO,
            rng: Box::new(rng),
            impairment,
            sent: View::new(),
            views: BTreeMap::new(),
            in_flight: Vec::new(),
        })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A test thread that panicked holding the lock left no half-made state.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds an observer; what was published before is sent to it like anything else.
    pub fn join(&self, observer: &str) {
        let mut state = self.state();
        state.views.entry(observer.to_owned()).or_default();
        for (node, annotations) in state.sent.clone() {
            state.send(observer, &node, Some(annotations));
        }
    }

    /// From now on the bus carries like this; deliveries under way keep their time.
    pub fn impair(&self, impairment: Impairment) {
        self.state().impairment = impairment;
    }

    /// Delivers what is due at `now`, oldest first. Time never runs back.
    pub fn advance(&self, now: Duration) {
        let mut state = self.state();
        state.now = state.now.max(now);
        let (mut due, later): (Vec<_>, Vec<_>) =
            std::mem::take(&mut state.in_flight).into_iter().partition(|delivery| delivery.due <= state.now);
        state.in_flight = later;
        due.sort_by_key(|delivery| delivery.due);
        for delivery in due {
            let Some(view) = state.views.get_mut(&delivery.to) else { continue };
            match delivery.annotations {
                Some(annotations) => view.insert(delivery.node, annotations),
                None => view.remove(&delivery.node),
            };
        }
    }

    /// Sends everyone's present announcement again, as a carrier's full copy does.
    pub fn resend(&self) {
        let mut state = self.state();
        for (node, annotations) in state.sent.clone() {
            state.broadcast(&node, Some(annotations));
        }
    }

    /// What `observer` has been delivered so far.
    pub fn view(&self, observer: &str) -> View {
        self.state().views.get(observer).cloned().unwrap_or_default()
    }

    /// Deliveries under way.
    pub fn in_flight(&self) -> usize {
        self.state().in_flight.len()
    }
}

impl State {
    fn broadcast(&mut self, node: &str, annotations: Option<BTreeMap<String, String>>) {
        let observers: Vec<String> = self.views.keys().cloned().collect();
        for observer in observers {
            self.send(&observer, node, annotations.clone());
        }
    }

    fn send(&mut self, to: &str, node: &str, annotations: Option<BTreeMap<String, String>>) {
        if self.rng.random_bool(self.impairment.loss.clamp(0.0, 1.0)) {
            return;
        }
        let mut due = self.now + self.rng.random_range(self.impairment.delay.clone());
        if !self.impairment.reorder {
            let earlier = self.in_flight.iter().filter(|d| d.to == to && d.node == node).map(|d| d.due).max();
            due = due.max(earlier.unwrap_or_default());
        }
        self.in_flight.push(Delivery { due, to: to.to_owned(), node: node.to_owned(), annotations });
    }
}

impl Publish for MemoryBus {
    fn publish(&mut self, announcement: &Announcement) -> Result<Published, PublishError> {
        check(announcement)?;
        let annotations = announcement.to_annotations();
        let mut state = self.state();
        if state.sent.get(&announcement.name) == Some(&annotations) {
            return Ok(Published::Unchanged);
        }
        state.sent.insert(announcement.name.clone(), annotations.clone());
        state.broadcast(&announcement.name, Some(annotations));
        Ok(Published::Changed)
    }

    fn withdraw(&mut self, node: &str) -> Result<Published, PublishError> {
        check_name(node)?;
        let mut state = self.state();
        if state.sent.remove(node).is_none() {
            return Ok(Published::Unchanged);
        }
        state.broadcast(node, None);
        Ok(Published::Changed)
    }
}
