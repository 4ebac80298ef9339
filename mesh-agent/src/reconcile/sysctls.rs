//! Kernel settings below /proc/sys. What they were before is remembered on disk, so that cleanup can put
//! it back.

use std::collections::BTreeMap;
use std::io;
use std::path::{Component, Path, PathBuf};

use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};

use super::{ReconcileError, Reconciler, Report, Stage};
use crate::desired::Desired;
use crate::own;

/// IPv6 settings by interface.
const INTERFACES: &str = "net/ipv6/conf";
/// IPv6 forwarding of the whole host.
const FORWARDING: &str = "net/ipv6/conf/all/forwarding";
/// Listening to router advertisements (Documentation/networking/ip-sysctl.rst).
const ACCEPT_RA: &str = "accept_ra";

/// What a setting was before us and what we made it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Change {
    /// Before.
    pub before: String,
    /// Ours.
    pub ours: String,
}

/// The present values of all settings we want or have changed (`None`: there is no such setting), and
/// the changes remembered.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Actual {
    /// By path.
    pub values: BTreeMap<String, Option<String>>,
    /// By path.
    pub changed: BTreeMap<String, Change>,
}

/// One change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Remember on disk what it was, then set.
    Set(String, Change),
    /// Put back what it was, then forget.
    Restore(String, String),
    /// Forget: it is gone, or somebody has changed it since.
    Forget(String),
}

/// What to change; and the settings this kernel does not have.
pub fn diff(actual: &Actual, desired: &Desired) -> (Vec<Op>, Vec<ReconcileError>) {
    let mut ops = Vec::new();
    let mut errors = Vec::new();
    for (path, wish) in &desired.sysctls {
        match actual.values.get(path).and_then(Option::as_ref) {
            None => errors.push(ReconcileError::new(format_args!("sysctl {path}"), "no such setting")),
            Some(now) if now == wish => {}
            Some(now) => {
                let before = match actual.changed.get(path) {
                    Some(change) => change.before.clone(),
                    None => now.clone(),
                };
                ops.push(Op::Set(path.clone(), Change { before, ours: wish.clone() }));
            }
        }
    }
    if desired.prune {
        for (path, change) in actual.changed.iter().filter(|(path, _)| !desired.sysctls.contains_key(*path)) {
            let still_ours = actual.values.get(path).and_then(Option::as_ref) == Some(&change.ours);
            ops.push(match still_ours {
                true => Op::Restore(path.clone(), change.before.clone()),
                false => Op::Forget(path.clone()),
            });
        }
    }
    (ops, errors)
}

/// Keeps [`Desired::sysctls`].
pub struct SysctlReconciler {
    root: PathBuf,
    memory: PathBuf,
}

impl SysctlReconciler {
    /// Settings below `root` (/proc/sys), changes remembered in the file `memory`.
    pub fn new(root: impl Into<PathBuf>, memory: impl Into<PathBuf>) -> Self {
        Self { root: root.into(), memory: memory.into() }
    }

    fn path(&self, name: &str) -> Result<PathBuf, ReconcileError> {
        // An interface's name is part of some paths; it must not lead out of the tree.
        match Path::new(name).components().all(|part| matches!(part, Component::Normal(_))) {
            true => Ok(self.root.join(name)),
            false => Err(ReconcileError::new(format_args!("sysctl {name}"), "not a relative path")),
        }
    }

    fn read_value(&self, name: &str) -> Result<Option<String>, ReconcileError> {
        match std::fs::read_to_string(self.path(name)?) {
            Ok(text) => Ok(Some(text.trim_end().replace('\t', " "))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(ReconcileError::new(format_args!("sysctl {name}"), error)),
        }
    }

    fn recall(&self) -> Result<BTreeMap<String, Change>, ReconcileError> {
        let object = self.memory.display().to_string();
        match std::fs::read(&self.memory) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|error| ReconcileError::new(object, error)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(BTreeMap::new()),
            Err(error) => Err(ReconcileError::new(object, error)),
        }
    }

    fn remember(&self, changed: &BTreeMap<String, Change>) -> Result<(), ReconcileError> {
        let object = || self.memory.display().to_string();
        let bytes =
            serde_json::to_vec_pretty(changed).map_err(|error| ReconcileError::new(object(), error))?;
        crate::files::write_atomic(&self.memory, &bytes, 0o600)
            .map_err(|error| ReconcileError::new(object(), error))
    }

    fn write_value(&self, name: &str, value: &str) -> Result<(), ReconcileError> {
        std::fs::write(self.path(name)?, value)
            .map_err(|error| ReconcileError::new(format_args!("sysctl {name} = {value}"), error))
    }

    fn apply(&self, changed: &mut BTreeMap<String, Change>, op: &Op) -> Result<(), ReconcileError> {
        match op {
            Op::Set(name, change) => {
                if changed.get(name) != Some(change) {
                    changed.insert(name.clone(), change.clone());
                    self.remember(changed)?;
                }
                self.write_value(name, &change.ours)
            }
            Op::Restore(name, before) => {
                self.write_value(name, before)?;
                changed.remove(name);
                self.remember(changed)
            }
            Op::Forget(name) => {
                changed.remove(name);
                self.remember(changed)
            }
        }
    }

    /// A host that forwards IPv6 no longer listens to router advertisements (`accept_ra` 1 means "unless
    /// forwarding"), and the kernel drops the routes it learned from them at that moment. Interfaces that
    /// listened until now go on listening (2), or the host would lose its way out.
    fn listeners(&self, changed: &BTreeMap<String, Change>) -> BTreeMap<String, String> {
        let interfaces = std::fs::read_dir(self.root.join(INTERFACES)).into_iter().flatten().flatten();
        let names = interfaces.filter_map(|entry| entry.file_name().into_string().ok());
        let listens = |name: &String| {
            let is = |setting: &str, value: &str| {
                let read = self.read_value(&format!("{INTERFACES}/{name}/{setting}"));
                read.is_ok_and(|now| now.as_deref() == Some(value))
            };
            let made_so = changed.contains_key(&format!("{INTERFACES}/{name}/{ACCEPT_RA}"));
            match made_so {
                true => !is(ACCEPT_RA, "0"),
                false => is(ACCEPT_RA, "1") && is("forwarding", "0"),
            }
        };
        let real = |name: &String| {
            !matches!(name.as_str(), "all" | "default" | "lo") && !own::is_device(name) && !own::is_veth(name)
        };
        let setting = |name| (format!("{INTERFACES}/{name}/{ACCEPT_RA}"), "2".to_owned());
        names.filter(real).filter(listens).map(setting).collect()
    }

    fn pass(&self, desired: &Desired) -> Result<Report, ReconcileError> {
        let mut report = Report::default();
        let changed = self.recall().unwrap_or_else(|error| {
            // Without it nothing can be put back, but forwarding still has to work.
            report.errors.push(error);
            BTreeMap::new()
        });
        let unreadable = !report.errors.is_empty();
        let mut sysctls = desired.sysctls.clone();
        if sysctls.get(FORWARDING).is_some_and(|wish| wish == "1") {
            sysctls.extend(self.listeners(&changed));
        }
        let desired = &Desired { sysctls, prune: desired.prune, ..Desired::default() };
        let mut actual = Actual { changed, ..Actual::default() };
        for name in desired.sysctls.keys().chain(actual.changed.keys()) {
            match self.read_value(name) {
                Ok(value) => drop(actual.values.insert(name.clone(), value)),
                Err(error) => report.errors.push(error),
            }
        }
        let (mut ops, errors) = diff(&actual, desired);
        // Before forwarding, which has its effect on the others at once.
        ops.sort_by_key(|op| !matches!(op, Op::Set(name, _) if name.ends_with(ACCEPT_RA)));
        report.errors.extend(errors);
        let mut changed = actual.changed;
        for op in &ops {
            report.record(match op {
                // A file that cannot be read is for a person to look at, not to be overwritten.
                Op::Set(name, change) if unreadable => self.write_value(name, &change.ours),
                _ => self.apply(&mut changed, op),
            });
        }
        Ok(report)
    }
}

impl Reconciler for SysctlReconciler {
    fn name(&self) -> &'static str {
        "sysctls"
    }

    fn stage(&self) -> Stage {
        Stage::Sysctls
    }

    fn reconcile<'a>(&'a mut self, desired: &'a Desired) -> BoxFuture<'a, Result<Report, ReconcileError>> {
        Box::pin(async move { self.pass(desired) })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::reconcile::laws;
    use proptest::collection::btree_map;
    use proptest::prelude::*;

    fn carry_out(actual: &mut Actual, op: &Op) {
        match op {
            Op::Set(name, change) => {
                actual.changed.insert(name.clone(), change.clone());
                actual.values.insert(name.clone(), Some(change.ours.clone()));
            }
            Op::Restore(name, before) => {
                actual.values.insert(name.clone(), Some(before.clone()));
                actual.changed.remove(name);
            }
            Op::Forget(name) => drop(actual.changed.remove(name)),
        }
    }

    fn value() -> impl Strategy<Value = String> {
        "[0-2]"
    }

    proptest! {
        #[test]
        fn settings_become_as_desired_and_go_back_to_what_they_were(
            start in btree_map("[a-c]", value(), 3), wish in btree_map("[a-c]", value(), 0..3),
            failures in laws::failures(),
        ) {
            let values: BTreeMap<_, _> = start.iter().map(|(k, v)| (k.clone(), Some(v.clone()))).collect();
            let actual = Actual { values, changed: BTreeMap::new() };
            let desired = Desired { sysctls: wish.clone(), prune: true, ..Desired::default() };
            let made = laws::converge(actual.clone(), failures.clone(), |a| diff(a, &desired).0, carry_out)?;
            for (name, wish) in &wish {
                prop_assert_eq!(made.values[name].as_ref(), Some(wish));
            }
            let nothing = Desired { prune: true, ..Desired::default() };
            let end = laws::converge(made, failures, |a| diff(a, &nothing).0, carry_out)?;
            prop_assert_eq!(end, actual);
        }
    }

    #[test]
    fn a_value_somebody_changed_since_is_left_alone() {
        let change = Change { before: "0".into(), ours: "1".into() };
        let actual = Actual {
            values: BTreeMap::from([("a".into(), Some("2".into())), ("b".into(), None)]),
            changed: BTreeMap::from([("a".into(), change.clone()), ("b".into(), change)]),
        };
        let nothing = Desired { prune: true, ..Desired::default() };
        assert_eq!(diff(&actual, &nothing).0, [Op::Forget("a".into()), Op::Forget("b".into())]);
    }

    #[tokio::test]
    async fn remembered_changes_survive_a_restart_and_a_broken_memory_is_not_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("sys");
        std::fs::create_dir(&root).unwrap();
        std::fs::write(root.join("forward"), "0\n").unwrap();
        let memory = dir.path().join("sysctls.json");
        let on = Desired { sysctls: [("forward".into(), "1".into())].into(), ..Desired::default() };
        let off = Desired { prune: true, ..Desired::default() };
        let now = || std::fs::read_to_string(root.join("forward")).unwrap();
        let new = || SysctlReconciler::new(&root, &memory);

        assert_eq!(new().reconcile(&on).await.unwrap().operations, 1);
        assert_eq!((now().as_str(), new().reconcile(&on).await.unwrap().operations), ("1", 0));
        assert_eq!(new().reconcile(&off).await.unwrap().operations, 1);
        assert_eq!(now(), "0");

        std::fs::write(&memory, "{").unwrap();
        let report = new().reconcile(&on).await.unwrap();
        assert!(report.errors[0].to_string().contains("sysctls.json"), "{report:?}");
        assert_eq!((now().as_str(), std::fs::read_to_string(&memory).unwrap().as_str()), ("1", "{"));
    }

    #[tokio::test]
    async fn interfaces_that_heard_router_advertisements_still_do_when_the_host_forwards() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("sys");
        let at = |interface: &str, setting: &str| root.join(INTERFACES).join(interface).join(setting);
        // (interface, accept_ra, forwarding): a host's, a router's, one that never listened, and a pod's.
        let interfaces =
            [("eth0", "1", "0"), ("eth1", "1", "1"), ("eth2", "0", "0"), ("mgy0123456789", "1", "0")];
        for (name, accept_ra, forwarding) in interfaces.into_iter().chain([("all", "1", "0")]) {
            std::fs::create_dir_all(root.join(INTERFACES).join(name)).unwrap();
            std::fs::write(at(name, ACCEPT_RA), accept_ra).unwrap();
            std::fs::write(at(name, "forwarding"), forwarding).unwrap();
        }
        let accepts = || interfaces.map(|(name, ..)| std::fs::read_to_string(at(name, ACCEPT_RA)).unwrap());
        let on =
            Desired { sysctls: [(FORWARDING.into(), "1".into())].into(), prune: true, ..Desired::default() };
        let mut sysctls = SysctlReconciler::new(&root, dir.path().join("memory"));
        assert_eq!(sysctls.reconcile(&on).await.unwrap().operations, 2);
        assert_eq!(accepts(), ["2", "1", "0", "1"]);
        // The kernel passes the switch on to every interface.
        std::fs::write(at("eth0", "forwarding"), "1").unwrap();
        assert_eq!(sysctls.reconcile(&on).await.unwrap().operations, 0);
        let off = Desired { prune: true, ..Desired::default() };
        assert_eq!(sysctls.reconcile(&off).await.unwrap().operations, 2);
        assert_eq!(accepts(), ["1", "1", "0", "1"]);
    }

    #[tokio::test]
    async fn a_path_that_leads_out_of_the_tree_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let desired = Desired { sysctls: [("../x".into(), "1".into())].into(), ..Desired::default() };
        let mut sysctls = SysctlReconciler::new(dir.path().join("sys"), dir.path().join("memory"));
        let report = sysctls.reconcile(&desired).await.unwrap();
        assert!(report.errors.iter().any(|error| error.message == "not a relative path"), "{report:?}");
        assert!(!dir.path().join("x").exists());
    }
}
