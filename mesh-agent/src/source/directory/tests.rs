#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::symlink;
use std::sync::Arc;

use tempfile::TempDir;
use tokio::time::timeout;

use super::*;
use crate::snapshot::Snapshot;

const DEADLINE: Duration = Duration::from_secs(20);

/// A running source over a directory of its own.
struct Fixture {
    dir: TempDir,
    store: Store,
    task: JoinHandle<()>,
}

impl Drop for Fixture {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Fixture {
    fn new(prepare: impl FnOnce(&Path)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        prepare(&dir.path().join("m"));
        let store = Store::new(&[NAME]);
        let source = DirectorySource::new(&dir.path().join("m"), "a", store.clone()).unwrap();
        Self { task: source.spawn(), dir, store }
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("m")
    }

    async fn until(&self, what: &str, holds: impl Fn(&Snapshot) -> bool) -> Arc<Snapshot> {
        let mut watch = self.store.watch();
        let found = timeout(DEADLINE, watch.wait_for(|snapshot| holds(snapshot))).await;
        let found =
            found.unwrap_or_else(|_| panic!("not within the deadline: {what}: {:#?}", self.store.current()));
        found.unwrap().clone()
    }

    async fn synced(&self) -> Arc<Snapshot> {
        timeout(DEADLINE, self.store.sync()).await.unwrap();
        self.store.current()
    }
}

fn node(name: &str) -> String {
    format!("apiVersion: v1\nkind: Node\nmetadata: {{name: {name}}}\n")
}

fn made(root: &Path) {
    fs::create_dir(root).unwrap();
}

#[tokio::test]
async fn files_that_come_change_and_go_are_followed() {
    let f = Fixture::new(made);
    f.until("an empty directory is read", |s| s.synced).await;
    fs::write(f.root().join("n.yaml"), node("a")).unwrap();
    f.until("a new file", |s| s.cluster.nodes.contains_key("a")).await;
    fs::create_dir_all(f.root().join("x/y")).unwrap();
    f.synced().await;
    fs::write(f.root().join("x/y/n.json"), r#"{"apiVersion":"v1","kind":"Node","metadata":{"name":"b"}}"#)
        .unwrap();
    f.until("a file in a new directory", |s| s.cluster.nodes.contains_key("b")).await;
    fs::write(f.root().join(".tmp"), node("c")).unwrap();
    fs::rename(f.root().join(".tmp"), f.root().join("n.yaml")).unwrap();
    f.until("a replaced file", |s| s.cluster.nodes.keys().eq(["b", "c"])).await;
    fs::remove_dir_all(f.root().join("x")).unwrap();
    f.until("a deleted directory", |s| s.cluster.nodes.keys().eq(["c"])).await;
}

#[tokio::test]
async fn a_directory_made_later_is_found_and_its_absence_deletes_nothing() {
    let f = Fixture::new(|_| {});
    let s = f.until("the absence is told", |s| !s.cluster.issues.is_empty()).await;
    assert!(!s.synced, "an unread source must not be pruned by");
    made(&f.root());
    fs::write(f.root().join("n.yaml"), node("a")).unwrap();
    f.until("the new directory", |s| s.synced && s.cluster.nodes.contains_key("a")).await;
    let away = f.dir.path().join("away");
    fs::rename(f.root(), &away).unwrap();
    let s = f.until("the absence is told", |s| !s.cluster.issues.is_empty()).await;
    assert!(s.cluster.nodes.contains_key("a"));
    made(&f.root());
    fs::write(f.root().join("n.yaml"), node("b")).unwrap();
    f.until("the replacement", |s| s.cluster.nodes.keys().eq(["b"]) && s.cluster.issues.is_empty()).await;
    fs::remove_file(f.root().join("n.yaml")).unwrap();
    f.until("an emptied directory is empty", |s| s.cluster.nodes.is_empty()).await;
}

#[tokio::test]
async fn a_mounted_config_map_is_followed_through_its_links() {
    let f = Fixture::new(|root| {
        fs::create_dir_all(root.join("..1")).unwrap();
        fs::write(root.join("..1/n.yaml"), node("a")).unwrap();
        symlink("..1", root.join("..data")).unwrap();
        symlink("..data/n.yaml", root.join("n.yaml")).unwrap();
        // Neither loops nor counts twice.
        symlink(".", root.join("loop")).unwrap();
        symlink("n.yaml", root.join("same.yaml")).unwrap();
        symlink("nowhere.yaml", root.join("dangling.yaml")).unwrap();
    });
    let s = f.until("the first version", |s| s.cluster.nodes.keys().eq(["a"])).await;
    assert!(s.cluster.issues.is_empty(), "{:?}", s.cluster.issues);
    fs::create_dir(f.root().join("..2")).unwrap();
    fs::write(f.root().join("..2/n.yaml"), node("b")).unwrap();
    symlink("..2", f.root().join("..tmp")).unwrap();
    fs::rename(f.root().join("..tmp"), f.root().join("..data")).unwrap();
    f.until("the second version", |s| s.cluster.nodes.keys().eq(["b"])).await;
}

#[tokio::test]
async fn a_broken_file_keeps_what_it_said_and_its_whole_documents_count() {
    let f = Fixture::new(made);
    let file = f.root().join("n.yaml");
    fs::write(&file, format!("{}---\n{}", node("a"), node("b"))).unwrap();
    let s = f.synced().await;
    assert_eq!(s.cluster.nodes.len(), 2);
    fs::write(&file, format!("{}---\n{}---\nkind: [", node("a"), node("c"))).unwrap();
    let s = f.synced().await;
    assert!(s.cluster.nodes.keys().eq(["a", "b", "c"]), "{:?}", s.cluster.nodes.keys());
    assert_eq!(s.cluster.issues.len(), 1);
    assert_eq!(s.cluster.issues[0].object, "file n.yaml");
    assert!(s.cluster.issues[0].message.starts_with("line 9: "), "{}", s.cluster.issues[0].message);
    fs::write(&file, "").unwrap();
    let s = f.synced().await;
    assert_eq!((s.cluster.nodes.len(), s.cluster.issues[0].reason.as_str()), (3, "Empty"));
    fs::write(&file, node("c")).unwrap();
    let s = f.synced().await;
    assert!(s.cluster.nodes.keys().eq(["c"]) && s.cluster.issues.is_empty());
}

#[tokio::test]
async fn a_refused_object_leaves_its_last_accepted_version_in_force() {
    let f = Fixture::new(made);
    let pod = |label: &str| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: p, labels: {{a: {label}}}}}\nspec: {{nodeName: a}}\n"
        )
    };
    fs::write(f.root().join("p.yaml"), pod("good")).unwrap();
    f.synced().await;
    fs::write(f.root().join("p.yaml"), pod("'not good'")).unwrap();
    let s = f.synced().await;
    assert_eq!(s.cluster.pods.values().next().unwrap().labels["a"], "good");
    let fields: Vec<&str> = s.cluster.issues.iter().map(|issue| issue.field.as_str()).collect();
    assert!(fields.contains(&"metadata.labels[a]"), "{:?}", s.cluster.issues);
}

#[tokio::test]
async fn a_sync_holds_what_was_written_before_it_even_within_the_clock_of_file_times() {
    let f = Fixture::new(made);
    let file = f.root().join("n.yaml");
    for round in 0..50 {
        let name = format!("n{round:02}");
        fs::write(&file, node(&name)).unwrap();
        let s = f.synced().await;
        assert!(s.cluster.nodes.keys().eq([name.as_str()]), "{name}: {:?}", s.cluster.nodes.keys());
    }
}

#[tokio::test]
async fn an_oversized_or_unreadable_file_is_told_and_hides_no_other() {
    let f = Fixture::new(made);
    fs::write(f.root().join("big.yaml"), vec![b'#'; file::MAX_FILE as usize + 1]).unwrap();
    fs::write(f.root().join("latin.yaml"), b"kind: \xe4").unwrap();
    fs::write(f.root().join("z.yaml"), node("z")).unwrap();
    let s = f.synced().await;
    assert!(s.cluster.nodes.contains_key("z"));
    let told: Vec<_> = s.cluster.issues.iter().map(|i| (i.object.as_str(), i.reason.as_str())).collect();
    assert_eq!(told, [("file big.yaml", "Unreadable"), ("file latin.yaml", "Unparsable")]);
}

#[tokio::test]
async fn a_node_says_in_its_own_file_only_what_annotations_can_say() {
    let f = Fixture::new(|root| fs::create_dir_all(root.join("nodes")).unwrap());
    let own = "apiVersion: v1\nkind: Node\nmetadata:\n  name: b\n  labels: {role: gateway}\n  annotations: \
               {margay.io/keys: '[]', margay.io/endpoint-override: 192.0.2.9}\nspec: {podCIDRs: [10.0.0.0/8]}\n\
               ---\napiVersion: v1\nkind: Node\nmetadata: {name: c}\n";
    fs::write(f.root().join("nodes/b.margay.yaml"), own).unwrap();
    fs::write(f.root().join("nodes/b.yaml"), "apiVersion: v1\nkind: Node\nmetadata: {name: b, labels: {x: why}}\nspec: {podCIDRs: [10.1.0.0/24]}\n").unwrap();
    let s = f.synced().await;
    assert!(s.cluster.nodes.keys().eq(["b"]));
    let b = &s.cluster.nodes["b"];
    assert_eq!(b.pod_cidrs, ["10.1.0.0/24".parse().unwrap()]);
    assert!(b.labels.keys().eq(["x"]) && b.annotations.keys().eq(["margay.io/keys"]));
    assert!(s.cluster.issues.iter().all(|issue| issue.reason == "NotAnAnnouncement"));
    let fields: Vec<&str> = s.cluster.issues.iter().map(|issue| issue.field.as_str()).collect();
    assert_eq!(fields, ["metadata.labels", "metadata.annotations", "spec.podCIDRs", "metadata.name"]);
}
