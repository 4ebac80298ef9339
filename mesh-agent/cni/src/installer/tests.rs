//! An installer that is stopped anywhere, and directories that others use too.

use std::cell::Cell;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;

use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;

/// A host's two directories with somebody else's files in them, and what is to be installed.
struct Host {
    root: TempDir,
}

const FLANNEL: &str =
    r#"{"cniVersion":"0.3.1","name":"cbr0","plugins":[{"type":"flannel"},{"type":"portmap"}]}"#;

impl Host {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let host = Self { root };
        for directory in ["bin", "conf", "given"] {
            fs::create_dir(host.path(directory)).unwrap();
        }
        for plugin in ["portmap", "bandwidth", "flannel"] {
            fs::write(host.path("bin").join(plugin), plugin).unwrap();
        }
        fs::write(host.path("conf/10-flannel.conflist"), FLANNEL).unwrap();
        host.give(&["mesh-cni", "portmap", "bandwidth"]);
        host
    }

    fn path(&self, below: &str) -> PathBuf {
        self.root.path().join(below)
    }

    fn give(&self, plugins: &[&str]) {
        let plugins: Vec<Value> = plugins.iter().map(|plugin| json!({"type": plugin})).collect();
        let list = json!({"cniVersion": "1.0.0", "name": "margay", "plugins": plugins});
        fs::write(self.path("given/10-margay.conflist"), list.to_string()).unwrap();
    }

    fn directories(&self) -> Directories {
        Directories { bin_dir: self.path("bin"), conf_dir: self.path("conf") }
    }

    fn own(&self) -> Install {
        let conflist = Some(self.path("given/10-margay.conflist"));
        Install { directories: self.directories(), conflist, chained: None }
    }

    fn chained(&self) -> Install {
        let chained = Some("10-flannel.conflist".into());
        Install { directories: self.directories(), conflist: None, chained }
    }

    /// All files but those being written, which no runtime reads.
    fn files(&self) -> Vec<(PathBuf, Vec<u8>)> {
        self.all().into_iter().filter(|(path, _)| !path.to_string_lossy().contains("/.")).collect()
    }

    fn all(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let mut files = Vec::new();
        for directory in ["bin", "conf"] {
            for entry in fs::read_dir(self.path(directory)).unwrap() {
                let path = entry.unwrap().path();
                let below = path.strip_prefix(self.root.path()).unwrap().to_owned();
                files.push((below, fs::read(&path).unwrap()));
            }
        }
        files.sort();
        files
    }

    fn read(&self, below: &str) -> Option<Vec<u8>> {
        fs::read(self.path(below)).ok()
    }

    fn list(&self, below: &str) -> Value {
        serde_json::from_slice(&self.read(below).unwrap()).unwrap()
    }
}

/// A plugin of ours of some version.
fn plugin(version: u8, length: usize) -> Vec<u8> {
    let mut bytes = vec![version; length];
    bytes.extend_from_slice(BINARY_MARK);
    bytes
}

/// Gives up at the step of this number, as if killed there.
fn dies_at(step: usize) -> Disk<'static> {
    let left = Cell::new(step);
    Disk::with_steps(move || match left.get() {
        0 => Err(io::Error::other("killed")),
        more => {
            left.set(more - 1);
            Ok(())
        }
    })
}

/// Steps of a run that nothing stops.
fn steps(run: impl FnOnce(&mut Disk<'_>)) -> usize {
    let count = Cell::new(0);
    run(&mut Disk::with_steps(|| {
        count.set(count.get() + 1);
        Ok(())
    }));
    count.get()
}

#[test]
fn plugin_and_list_are_put_in_place_and_a_second_time_changes_nothing() {
    let host = Host::new();
    let done = put(&mut Disk::default(), &host.own(), &plugin(1, 100)).unwrap();
    assert!(done[0].starts_with("wrote") && done[1].starts_with("wrote"), "{done:?}");
    let mode = |below| fs::metadata(host.path(below)).unwrap().permissions().mode() & 0o7777;
    assert_eq!((mode("bin/mesh-cni"), mode("conf/10-margay.conflist")), (0o755, 0o644));
    assert_eq!(host.list("conf/10-margay.conflist")["plugins"].as_array().unwrap().len(), 3);
    let before = host.files();
    assert_eq!(steps(|disk| drop(put(disk, &host.own(), &plugin(1, 100)).unwrap())), 0);
    assert_eq!(host.files(), before);
}

#[test]
fn chained_behind_flannel_it_sorts_first_and_leaves_flannels_file_alone() {
    let host = Host::new();
    put(&mut Disk::default(), &host.chained(), &plugin(1, 10)).unwrap();
    let list = host.list("conf/05-margay-flannel.conflist");
    let types: Vec<&str> =
        list["plugins"].as_array().unwrap().iter().map(|p| p["type"].as_str().unwrap()).collect();
    assert_eq!(types, ["flannel", "portmap", "mesh-cni"]);
    assert_eq!(list["plugins"][2]["chained"], json!(true));
    assert_eq!((&list["name"], &list["cniVersion"]), (&json!("cbr0"), &json!("0.3.1")));
    assert_eq!(host.read("conf/10-flannel.conflist").unwrap(), FLANNEL.as_bytes());
    // Follows what flannel changes.
    let changed = FLANNEL.replace("cbr0", "cbr1");
    fs::write(host.path("conf/10-flannel.conflist"), &changed).unwrap();
    put(&mut Disk::default(), &host.chained(), &plugin(1, 10)).unwrap();
    assert_eq!(host.list("conf/05-margay-flannel.conflist")["name"], json!("cbr1"));
}

#[test]
fn a_single_plugin_is_chained_as_a_list() {
    let host = Host::new();
    fs::write(host.path("conf/20-x.conf"), r#"{"cniVersion":"0.4.0","name":"x","type":"flannel","a":1}"#)
        .unwrap();
    let install = Install { chained: Some("20-x.conf".into()), ..host.chained() };
    put(&mut Disk::default(), &install, &plugin(1, 10)).unwrap();
    let list = host.list("conf/05-margay-x.conflist");
    assert_eq!(list["plugins"][0], json!({"type": "flannel", "a": 1}));
    assert_eq!(list["name"], json!("x"));
}

#[test]
fn going_from_chained_to_own_leaves_one_list_of_ours() {
    let host = Host::new();
    put(&mut Disk::default(), &host.chained(), &plugin(1, 10)).unwrap();
    let done = put(&mut Disk::default(), &host.own(), &plugin(1, 10)).unwrap();
    assert!(host.read("conf/05-margay-flannel.conflist").is_none(), "{done:?}");
    assert_eq!(conflist::ours_in(&host.path("conf")).unwrap(), [host.path("conf/10-margay.conflist")]);
}

#[test]
fn another_configuration_that_sorts_first_is_named() {
    let host = Host::new();
    fs::write(host.path("conf/00-cilium.conflist"), "{}").unwrap();
    let done = put(&mut Disk::default(), &host.own(), &plugin(1, 10)).unwrap();
    assert!(done.iter().any(|line| line.contains("00-cilium.conflist sorts before")), "{done:?}");
}

#[test]
fn what_is_not_ours_is_neither_overwritten_nor_removed() {
    for below in ["bin/mesh-cni", "conf/10-margay.conflist"] {
        let host = Host::new();
        fs::write(host.path(below), r#"{"name":"theirs","plugins":[{"type":"bridge"}]}"#).unwrap();
        let before = host.all();
        let error = put(&mut Disk::default(), &host.own(), &plugin(1, 10)).unwrap_err();
        assert!(format!("{error:#}").contains(below), "{error:#}");
        uninstall(&mut Disk::default(), &host.directories()).unwrap();
        assert_eq!(host.all(), before);
    }
}

#[test]
fn a_plugin_that_another_list_names_stays() {
    let host = Host::new();
    put(&mut Disk::default(), &host.own(), &plugin(1, 10)).unwrap();
    fs::write(host.path("conf/99-mine.conflist"), r#"{"name":"m","plugins":[{"type":"mesh-cni"}]}"#).unwrap();
    let done = uninstall(&mut Disk::default(), &host.directories()).unwrap();
    assert!(done.iter().any(|line| line.contains("99-mine.conflist names it")), "{done:?}");
    assert!(host.read("bin/mesh-cni").is_some() && host.read("conf/10-margay.conflist").is_none());
}

#[test]
fn bad_lists_are_refused_by_file_and_field_before_anything_is_written() {
    let host = Host::new();
    let before = host.all();
    for (text, expected) in [
        ("{", "EOF"),
        ("{}", "name: is missing"),
        (r#"{"name":"m"}"#, "plugins: is missing"),
        (r#"{"name":"m","plugins":[]}"#, "plugins: is empty"),
        (r#"{"name":"m","plugins":[{}]}"#, "plugins[0].type: is missing"),
        (r#"{"name":"m","plugins":[{"type":"../x"}]}"#, "plugins[0].type: is not a plugin's name"),
        (r#"{"name":"m","plugins":[{"type":"portmap"}]}"#, "no \"mesh-cni\" among them"),
        (r#"{"name":"m","plugins":[{"type":"mesh-cni"},{"type":"tuning"}]}"#, "plugin \"tuning\""),
    ] {
        fs::write(host.path("given/10-margay.conflist"), text).unwrap();
        let error = format!("{:#}", put(&mut Disk::default(), &host.own(), &plugin(1, 10)).unwrap_err());
        assert!(error.contains("10-margay.conflist") && error.contains(expected), "{text}: {error}");
        assert_eq!(host.all(), before, "{text}");
    }
    let absent = Install { chained: Some("30-none.conflist".into()), ..host.chained() };
    let error = format!("{:#}", put(&mut Disk::default(), &absent, &plugin(1, 10)).unwrap_err());
    assert!(error.contains("30-none.conflist"), "{error}");
    let outside = Install { chained: Some("../given/10-margay.conflist".into()), ..host.chained() };
    assert!(put(&mut Disk::default(), &outside, &plugin(1, 10)).is_err());
    let early = Install { chained: Some("00-early.conflist".into()), ..host.chained() };
    fs::write(host.path("conf/00-early.conflist"), FLANNEL).unwrap();
    let error = format!("{:#}", put(&mut Disk::default(), &early, &plugin(1, 10)).unwrap_err());
    assert!(error.contains("sorts before"), "{error}");
}

#[test]
fn this_very_program_bears_the_mark() {
    assert!(is_our_binary(&fs::read(std::env::current_exe().unwrap()).unwrap()));
    assert!(!is_our_binary(&fs::read("/bin/true").unwrap()));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever was installed before and wherever the next installer dies: each file is the old one, the new one, or
    /// not yet there, a list is never without its plugin, and the one after that brings all to its end.
    #[test]
    fn killed_anywhere_every_file_is_old_or_new(
        earlier in proptest::option::of((any::<bool>(), 0usize..5000)),
        chained in any::<bool>(),
        length in 0usize..5000,
        removes in any::<bool>(),
    ) {
        let run = |host: &Host, disk: &mut Disk<'_>| {
            let install = if chained { host.chained() } else { host.own() };
            match removes {
                true => uninstall(disk, &host.directories()),
                false => put(disk, &install, &plugin(2, length)),
            }
        };
        let prepare = || {
            let host = Host::new();
            if let Some((chained, length)) = earlier {
                host.give(&["mesh-cni", "portmap"]);
                let install = if chained { host.chained() } else { host.own() };
                put(&mut Disk::default(), &install, &plugin(1, length)).unwrap();
                host.give(&["mesh-cni", "portmap", "bandwidth"]);
            }
            host
        };
        let host = prepare();
        let old = host.files();
        let count = steps(|disk| drop(run(&host, disk).unwrap()));
        let new = host.files();
        for step in 0..count {
            let host = prepare();
            prop_assert!(run(&host, &mut dies_at(step)).is_err(), "step {}", step);
            for file in host.files() {
                prop_assert!(old.contains(&file) || new.contains(&file), "step {}: {:?}", step, file.0);
            }
            for path in conflist::naming(&host.path("conf"), PLUGIN).unwrap() {
                prop_assert!(host.read("bin/mesh-cni").is_some(), "step {}: {} without plugin", step, path);
            }
            for below in ["conf/10-flannel.conflist", "bin/portmap", "bin/flannel"] {
                prop_assert!(host.read(below).is_some(), "step {}: {}", step, below);
            }
            run(&host, &mut Disk::default()).unwrap();
            prop_assert_eq!(host.files(), new.clone(), "step {}", step);
        }
    }

    #[test]
    fn no_bytes_bring_it_down(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let host = Host::new();
        fs::write(host.path("conf/10-flannel.conflist"), &bytes).unwrap();
        fs::write(host.path("given/10-margay.conflist"), &bytes).unwrap();
        prop_assert!(put(&mut Disk::default(), &host.chained(), &plugin(1, 1)).is_err());
        prop_assert!(put(&mut Disk::default(), &host.own(), &plugin(1, 1)).is_err());
        uninstall(&mut Disk::default(), &host.directories()).unwrap();
        prop_assert_eq!(host.read("conf/10-flannel.conflist").unwrap(), bytes);
    }
}
