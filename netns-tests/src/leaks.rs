//! What the machine's own namespaces hold, to be compared before and after a lab.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

use anyhow::{Context, Result, bail};

/// Set for everything that a lab starts, so that what is left of it can be told from other people's
/// processes.
pub const MARK: &str = "MESH_LAB_RUN";

/// The machine as a lab must leave it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    links: BTreeSet<String>,
    addresses: BTreeSet<String>,
    routes: BTreeSet<String>,
    rules: BTreeSet<String>,
    tables: BTreeSet<String>,
    mounts: BTreeSet<String>,
    pins: BTreeSet<String>,
    named_namespaces: BTreeSet<String>,
}

impl Machine {
    /// Looks at links, addresses, routes, rules, nftables, mounts, BPF pins and named namespaces of the
    /// machine itself.
    pub fn look() -> Result<Self> {
        let mut routes = lines("ip", &["-4", "route", "show", "table", "all"])?;
        routes.extend(lines("ip", &["-6", "route", "show", "table", "all"])?);
        let mut rules = lines("ip", &["-4", "rule"])?;
        rules.extend(lines("ip", &["-6", "rule"])?);
        // Lease times count down and flags come and go.
        let settled = |line: String| {
            let mut words: Vec<&str> = line.split_whitespace().collect();
            if let Some(at) = words.iter().position(|word| *word == "expires") {
                words.drain(at..(at + 2).min(words.len()));
            }
            words.join(" ")
        };
        let mounts = fs::read_to_string("/proc/self/mountinfo").context("read mounts")?;
        Ok(Self {
            links: lines("ip", &["-br", "link"])?.into_iter().map(settled).collect(),
            addresses: lines("ip", &["-br", "address"])?.into_iter().map(settled).collect(),
            routes: routes.into_iter().map(settled).collect(),
            rules,
            tables: lines("nft", &["list", "tables"])?,
            mounts: mounts.lines().filter_map(|line| line.split(' ').nth(4).map(String::from)).collect(),
            pins: entries("/sys/fs/bpf"),
            named_namespaces: entries("/run/netns"),
        })
    }

    /// What is there now and was not, or the other way.
    pub fn difference(&self, after: &Self) -> Vec<String> {
        let mut found = Vec::new();
        for (what, before, after) in [
            ("link", &self.links, &after.links),
            ("address", &self.addresses, &after.addresses),
            ("route", &self.routes, &after.routes),
            ("rule", &self.rules, &after.rules),
            ("nft table", &self.tables, &after.tables),
            ("mount", &self.mounts, &after.mounts),
            ("BPF pin", &self.pins, &after.pins),
            ("named namespace", &self.named_namespaces, &after.named_namespaces),
        ] {
            found.extend(after.difference(before).map(|line| format!("{what} left: {line}")));
            found.extend(before.difference(after).map(|line| format!("{what} gone: {line}")));
        }
        found
    }
}

/// Processes whose environment bears this mark, or that are in one of these network namespaces (inodes), the
/// caller apart.
pub fn left(mark: &str, namespaces: &[u64]) -> Result<Vec<String>> {
    let wanted = format!("{MARK}={mark}");
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").context("list processes")? {
        let Ok(entry) = entry else { continue };
        let name = entry.file_name().to_string_lossy().into_owned();
        if name == std::process::id().to_string() || !name.bytes().all(|byte| byte.is_ascii_digit()) {
            continue;
        }
        let environ = fs::read(entry.path().join("environ")).unwrap_or_default();
        let marked = environ.split(|byte| *byte == 0).any(|variable| variable == wanted.as_bytes());
        let namespace = fs::read_link(entry.path().join("ns/net")).unwrap_or_default();
        let inside = namespaces.iter().any(|inode| namespace.to_string_lossy() == format!("net:[{inode}]"));
        if marked || inside {
            let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let command = String::from_utf8_lossy(&command).replace('\0', " ");
            found.push(format!("process left: {name} {}", command.trim()));
        }
    }
    for (mount, line) in
        fs::read_to_string("/proc/self/mountinfo").context("read mounts")?.lines().enumerate()
    {
        if namespaces.iter().any(|inode| line.contains(&format!("net:[{inode}]"))) {
            found.push(format!("namespace mounted: {mount} {line}"));
        }
    }
    Ok(found)
}

fn lines(program: &str, arguments: &[&str]) -> Result<BTreeSet<String>> {
    let output = Command::new(program).args(arguments).output().with_context(|| format!("run {program}"))?;
    if !output.status.success() {
        bail!("{program} {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8_lossy(&output.stdout).lines().map(String::from).collect())
}

fn entries(directory: &str) -> BTreeSet<String> {
    let list = fs::read_dir(directory).into_iter().flatten().flatten();
    list.map(|entry| entry.path().display().to_string()).collect()
}
