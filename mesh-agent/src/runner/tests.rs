#![allow(clippy::unwrap_used)]

use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use futures::future::BoxFuture;

use super::*;
use crate::snapshot::{Endpoint, ObjectRef};

type Outcome = Result<Report, ReconcileError>;
type Log = Arc<Mutex<Vec<(&'static str, Desired)>>>;

/// Says what `answer` says, and writes down what it was asked.
struct Fake {
    name: &'static str,
    stage: Stage,
    log: Log,
    answer: Arc<Mutex<Box<dyn FnMut() -> Outcome + Send>>>,
}

impl Reconciler for Fake {
    fn name(&self) -> &'static str {
        self.name
    }

    fn stage(&self) -> Stage {
        self.stage
    }

    fn reconcile<'a>(&'a mut self, desired: &'a Desired) -> BoxFuture<'a, Outcome> {
        self.log.lock().unwrap().push((self.name, desired.clone()));
        let answer = (self.answer.lock().unwrap())();
        Box::pin(async { answer })
    }
}

fn fake(
    log: &Log,
    name: &'static str,
    stage: Stage,
    answer: impl FnMut() -> Outcome + Send + 'static,
) -> Box<dyn Reconciler> {
    Box::new(Fake { name, stage, log: log.clone(), answer: Arc::new(Mutex::new(Box::new(answer))) })
}

fn done() -> Outcome {
    Ok(Report::default())
}

fn failed(object: &str) -> Outcome {
    Ok(Report { operations: 0, errors: vec![ReconcileError::new(object, "no")] })
}

fn with_pods(links: &[&str]) -> Desired {
    let endpoint = Endpoint {
        pod: ObjectRef { namespace: "default".into(), name: "p".into() },
        container_id: "c".into(),
        ifname: "eth0".into(),
        ifindex: 1,
        pod_mac: [2; 6],
        ips: vec![],
    };
    let mut desired = Desired { generation: 1, ..Desired::default() };
    Arc::make_mut(&mut desired.policy).endpoints =
        links.iter().map(|link| ((*link).to_owned(), endpoint.clone())).collect();
    desired
}

fn withheld(log: &Log) -> Vec<String> {
    let log = log.lock().unwrap();
    let routes = log.iter().rev().find(|(name, _)| *name == "routes").unwrap();
    routes.1.withhold.iter().cloned().collect()
}

#[tokio::test]
async fn stages_run_in_order_whatever_fails() {
    let log = Log::default();
    let reconcilers = vec![
        fake(&log, "rules", Stage::Rules, done),
        fake(&log, "routes", Stage::Routes, || Err(ReconcileError::new("routes", "no"))),
        fake(&log, "policy", Stage::Policy, || Err(ReconcileError::new("policy", "no"))),
        fake(&log, "sysctls", Stage::Sysctls, done),
    ];
    let board = Board::new(&["sysctls", "policy", "routes", "rules"]);
    Runner::new(reconcilers, board.clone()).pass(&with_pods(&[]), Cause::Plan).await;
    let names: Vec<_> = log.lock().unwrap().iter().map(|(name, _)| *name).collect();
    assert_eq!(names, ["sysctls", "policy", "routes", "rules"]);
    let states: Vec<_> = board.observed().reconcilers.iter().map(|row| row.state.clone()).collect();
    assert_eq!(states, ["done", "error", "error", "done"]);
}

#[tokio::test]
async fn a_pods_routes_wait_for_its_policy_and_stay_when_policy_fails_later() {
    let log = Log::default();
    let answers = Arc::new(Mutex::new(vec![
        Err(ReconcileError::new("policy", "maps are gone")),
        failed("device b"),
        done(),
        failed("policy engine"),
        done(),
        failed("link a"),
    ]));
    let policy = move || answers.lock().unwrap().remove(0);
    let reconcilers =
        vec![fake(&log, "policy", Stage::Policy, policy), fake(&log, "routes", Stage::Routes, done)];
    let mut runner = Runner::new(reconcilers, Board::new(&["policy", "routes"]));
    runner.index = |link| (link != "absent").then_some(1);

    runner.pass(&with_pods(&["a", "b"]), Cause::Plan).await;
    assert_eq!(withheld(&log), ["a", "b"], "nothing opens while the engine fails");
    runner.pass(&with_pods(&["a", "b"]), Cause::Event).await;
    assert_eq!(withheld(&log), ["b"], "one pod's trouble is not another's");
    runner.pass(&with_pods(&["a", "b"]), Cause::Event).await;
    assert!(withheld(&log).is_empty());
    runner.pass(&with_pods(&["a", "c"]), Cause::Event).await;
    assert_eq!(withheld(&log), ["c"], "what was in place stays, what is new waits");
    runner.pass(&with_pods(&["a", "absent"]), Cause::Event).await;
    assert_eq!(withheld(&log), ["absent"], "who is not there cannot have a policy");
    runner.pass(&with_pods(&["a"]), Cause::Event).await;
    assert_eq!(withheld(&log), ["a"], "made anew, it has to show its policy anew");
}

#[tokio::test]
async fn a_link_replaced_in_the_middle_of_a_pass_is_another_link() {
    static INDEX: AtomicU32 = AtomicU32::new(1);
    let log = Log::default();
    let replace = || {
        INDEX.store(2, Ordering::SeqCst);
        done()
    };
    let reconcilers = vec![
        fake(&log, "policy", Stage::Policy, done),
        fake(&log, "links", Stage::Links, replace),
        fake(&log, "routes", Stage::Routes, done),
    ];
    let mut runner = Runner::new(reconcilers, Board::new(&["policy", "links", "routes"]));
    runner.index = |_| Some(INDEX.load(Ordering::SeqCst));
    runner.pass(&with_pods(&["a"]), Cause::Plan).await;
    assert_eq!(withheld(&log), ["a"], "its policy was the other's");
    runner.pass(&with_pods(&["a"]), Cause::Event).await;
    assert!(withheld(&log).is_empty());
}

#[tokio::test]
async fn a_failed_reconciler_waits_for_its_turn_and_for_nothing_when_there_is_news() {
    let log = Log::default();
    let reconcilers = vec![
        fake(&log, "policy", Stage::Policy, done),
        fake(&log, "routes", Stage::Routes, || failed("route x")),
    ];
    let mut runner = Runner::new(reconcilers, Board::new(&["policy", "routes"]));
    let mut counts = |cause| {
        let log = log.clone();
        futures::executor::block_on(runner.pass(&with_pods(&[]), cause));
        let count = |name| log.lock().unwrap().iter().filter(|(other, _)| *other == name).count();
        (count("policy"), count("routes"))
    };
    assert_eq!(counts(Cause::Plan), (1, 1));
    assert_eq!(counts(Cause::Timer), (2, 1), "still backing off");
    assert_eq!(counts(Cause::Event), (3, 2), "an event may be what it waits for");
    assert_eq!(counts(Cause::Plan), (4, 3));
}

#[test]
fn waits_grow_to_a_limit() {
    let waits: Vec<u64> = [0, 1, 2, 5, 40].map(|failures| backoff(failures).as_secs()).to_vec();
    assert_eq!(waits, [1, 2, 4, 30, 30]);
    let mut quiet = DEBOUNCE;
    for _ in 0..20 {
        quiet = next_quiet(quiet, Cause::Event, 1);
    }
    assert_eq!(quiet, RESYNC, "a fight with another program slows down");
    assert_eq!(next_quiet(quiet, Cause::Event, 0), DEBOUNCE);
}

#[tokio::test]
async fn own_changes_that_come_back_as_events_do_not_spin() {
    let log = Log::default();
    let events = Arc::new(Notify::new());
    let echo = events.clone();
    let fight = move || {
        echo.notify_one();
        Ok(Report { operations: 1, errors: vec![] })
    };
    let runner = Runner::new(vec![fake(&log, "routes", Stage::Routes, fight)], Board::new(&["routes"]));
    let (plans, receiver) = watch::channel(Arc::new(with_pods(&[])));
    let task = tokio::spawn(runner.run(receiver, events));
    tokio::time::sleep(Duration::from_secs(1)).await;
    // At 0, 0.05, 0.15, 0.35 and 0.75 seconds.
    let passes = log.lock().unwrap().len();
    assert!((2..=6).contains(&passes), "{passes} passes in a second");
    plans.send(Arc::new(with_pods(&["a"]))).unwrap();
    let deadline = Instant::now() + Duration::from_secs(5);
    while log.lock().unwrap().last().unwrap().1.policy.endpoints.is_empty() {
        assert!(Instant::now() < deadline, "the new plan was not seen");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    drop(plans);
    task.await.unwrap();
}
