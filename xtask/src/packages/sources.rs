//! apt's package sources: reads the system's entries, keeps those of the
//! running release, derives its backports suite.

/// One package source, as a stanza of deb822 has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    uris: Vec<String>,
    suites: Vec<String>,
    components: Vec<String>,
    /// Further fields with their values (`Signed-By`, ...), kept as they are.
    options: Vec<(String, String)>,
}

/// What the release calls its suites after its code name.
const POCKETS: [&str; 5] = ["", "-updates", "-security", "/updates", "-backports"];

impl Source {
    fn has_suite(&self, suite: &str) -> bool {
        self.suites.iter().any(|own| own == suite)
    }

    /// The entry as a stanza.
    pub fn to_deb822(&self) -> String {
        let mut text = format!(
            "Types: deb\nURIs: {}\nSuites: {}\nComponents: {}\n",
            self.uris.join(" "),
            self.suites.join(" "),
            self.components.join(" ")
        );
        for (name, value) in &self.options {
            text.push_str(&format!("{name}: {value}\n"));
        }
        text
    }
}

/// Reads a `.list` file: one `deb [options] uri suite component...` a line.
pub fn parse_list(text: &str) -> Vec<Source> {
    text.lines().filter_map(parse_line).collect()
}

fn parse_line(line: &str) -> Option<Source> {
    let line = line.split('#').next().unwrap_or_default().trim();
    let mut rest = line.strip_prefix("deb")?;
    if !rest.starts_with([' ', '\t', '[']) {
        return None; // deb-src
    }
    rest = rest.trim_start();
    let mut options = Vec::new();
    if let Some(inner) = rest.strip_prefix('[') {
        let (inside, after) = inner.split_once(']')?;
        for (name, value) in inside
            .split_whitespace()
            .filter_map(|word| word.split_once('='))
        {
            options.push((field_name(name).to_owned(), value.replace(',', " ")));
        }
        rest = after;
    }
    let mut words = rest.split_whitespace().map(str::to_owned);
    Some(Source {
        uris: vec![words.next()?],
        suites: vec![words.next()?],
        components: words.collect(),
        options,
    })
}

/// The deb822 field for an option of the one-line format.
fn field_name(option: &str) -> &str {
    match option {
        "arch" => "Architectures",
        "signed-by" => "Signed-By",
        "trusted" => "Trusted",
        "lang" => "Languages",
        "target" => "Targets",
        other => other,
    }
}

/// Reads a `.sources` file: deb822 stanzas.
pub fn parse_deb822(text: &str) -> Vec<Source> {
    let mut stanzas: Vec<Vec<(String, String)>> = vec![Vec::new()];
    for line in text.lines() {
        if line.starts_with('#') {
            continue;
        }
        if line.trim().is_empty() {
            stanzas.push(Vec::new());
        } else if let Some(stanza) = stanzas.last_mut() {
            if line.starts_with([' ', '\t']) {
                if let Some((_, value)) = stanza.last_mut() {
                    value.push('\n');
                    value.push_str(line);
                }
            } else if let Some((name, value)) = line.split_once(':') {
                stanza.push((name.trim().to_owned(), value.trim().to_owned()));
            }
        }
    }
    stanzas.into_iter().filter_map(source_of).collect()
}

fn source_of(stanza: Vec<(String, String)>) -> Option<Source> {
    let mut source = Source {
        uris: Vec::new(),
        suites: Vec::new(),
        components: Vec::new(),
        options: Vec::new(),
    };
    let words = |value: &str| value.split_whitespace().map(str::to_owned).collect();
    let mut binary = false;
    for (name, value) in stanza {
        match name.to_ascii_lowercase().as_str() {
            "types" => binary = value.split_whitespace().any(|kind| kind == "deb"),
            "uris" => source.uris = words(&value),
            "suites" => source.suites = words(&value),
            "components" => source.components = words(&value),
            "enabled" if value.eq_ignore_ascii_case("no") => return None,
            "enabled" => {}
            _ => source.options.push((name, value)),
        }
    }
    (binary && !source.uris.is_empty() && !source.suites.is_empty()).then_some(source)
}

/// Keeps what belongs to the release itself: its suites with component `main`.
/// Sources of third parties could fail for reasons that are none of ours.
pub fn of_release(sources: &[Source], codename: &str) -> Vec<Source> {
    sources
        .iter()
        .filter(|source| source.components.iter().any(|name| name == "main"))
        .filter_map(|source| {
            let mut source = source.clone();
            source.suites.retain(|suite| {
                suite
                    .strip_prefix(codename)
                    .is_some_and(|pocket| POCKETS.contains(&pocket))
            });
            (!source.suites.is_empty()).then_some(source)
        })
        .collect()
}

/// The release's backports suite, at the place where its main suite is. `None`
/// when there is no main suite, or backports are among the sources already.
pub fn backports(sources: &[Source], codename: &str) -> Option<Source> {
    let suite = format!("{codename}-backports");
    if sources.iter().any(|source| source.has_suite(&suite)) {
        return None;
    }
    let updates = format!("{codename}-updates");
    let mut places = sources.iter().filter(|source| source.has_suite(codename));
    // An archive with the updates pocket is the distribution's own.
    let is_own = |place: &&Source| {
        sources
            .iter()
            .any(|other| other.has_suite(&updates) && other.uris == place.uris)
    };
    let place = places.clone().find(is_own).or_else(|| places.next())?;
    Some(Source {
        suites: vec![suite],
        ..place.clone()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEB822: &str = "\
Types: deb
# a remark
URIs: http://archive.invalid/debian
Suites: bookworm bookworm-updates
Components: main
Signed-By: /usr/share/keyrings/debian.gpg

Types: deb deb-src
URIs: http://archive.invalid/security
Suites: bookworm-security
Components: main contrib
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 abc

Types: deb
Enabled: no
URIs: http://off.invalid
Suites: bookworm
Components: main

Types: deb-src
URIs: http://archive.invalid/debian
Suites: bookworm
Components: main
";

    const LIST: &str = "\
# remark
deb [arch=amd64 signed-by=/k.gpg] http://thirdparty.invalid bookworm main # tail
deb http://archive.invalid/debian bookworm main contrib
deb-src http://archive.invalid/debian bookworm main
deb http://archive.invalid/debian bookworm-updates main
deb http://tool.invalid nodistro main
deb http://tool.invalid bookworm stable
";

    #[test]
    fn both_formats_are_read() {
        let sources = parse_deb822(DEB822);
        assert_eq!(sources.len(), 2);
        assert_eq!(sources[0].suites, ["bookworm", "bookworm-updates"]);
        assert!(sources[1].to_deb822().contains("Signed-By: \n -----BEGIN"));
        assert!(
            sources[1].to_deb822().ends_with("\n abc\n"),
            "continuation lines stay"
        );
        let list = parse_list(LIST);
        assert_eq!(list.len(), 5);
        assert_eq!(
            list[0].options,
            [
                ("Architectures".to_owned(), "amd64".to_owned()),
                ("Signed-By".to_owned(), "/k.gpg".to_owned())
            ]
        );
        assert_eq!(list[1].components, ["main", "contrib"]);
    }

    #[test]
    fn a_stanza_survives_being_written_and_read() {
        for source in parse_deb822(DEB822).iter().chain(&parse_list(LIST)) {
            assert_eq!(
                parse_deb822(&source.to_deb822()),
                *std::slice::from_ref(source)
            );
        }
    }

    #[test]
    fn only_the_releases_own_suites_are_kept() {
        let kept = of_release(&parse_list(LIST), "bookworm");
        assert_eq!(kept.len(), 3, "{kept:?}");
        assert!(of_release(&parse_list(LIST), "trixie").is_empty());
    }

    #[test]
    fn backports_come_from_where_the_distribution_is() {
        let source = backports(&parse_list(LIST), "bookworm").unwrap();
        assert_eq!(source.uris, ["http://archive.invalid/debian"]);
        assert_eq!(source.suites, ["bookworm-backports"]);
        let source = backports(&parse_deb822(DEB822), "bookworm").unwrap();
        assert_eq!(
            source.options,
            [(
                "Signed-By".to_owned(),
                "/usr/share/keyrings/debian.gpg".to_owned()
            )]
        );
    }

    #[test]
    fn backports_are_not_added_twice_nor_to_nothing() {
        let mut sources = parse_deb822(DEB822);
        sources.push(backports(&sources, "bookworm").unwrap());
        assert_eq!(backports(&sources, "bookworm"), None);
        assert_eq!(backports(&[], "bookworm"), None);
        assert_eq!(backports(&sources, "trixie"), None);
    }
}
