/** The identity files in models/sefi, as ComfyUI's own routes describe them. */
import { api } from "../../../scripts/api.js"

const FOLDER = "sefi"
const FRESH_MILLISECONDS = 3000
const AT_ONCE = 6
const PICTURE = /^data:image\/(jpeg|png|webp);base64,[A-Za-z0-9+/=]+$/
const NAME = /^[\p{L}\p{M}\p{N}_\-\u200c\u200d]{1,64}$/u

/** How users know the base model families of identity files. */
export const FAMILIES = { sd1: "SD 1.x", sd2: "SD 2.x", sdxl: "SDXL" }

let listing = null
let listedAt = -Infinity
const identities = new Map()
const others = new Map()

/** Whether a text can be the name of an identity, and so stand in a placeholder. */
export function isName(text) {
    return typeof text === "string" && NAME.test(text)
}

/**
 * All identity files: `[{ file, modified }]`; an empty list if the server cannot tell.
 *
 * What is known already is good enough unless it is older than `oldest`, in milliseconds.
 */
export function identityFiles(oldest = Infinity) {
    if (!listing || performance.now() - listedAt >= oldest) {
        listedAt = performance.now()
        listing = readListing()
    }
    return listing
}

/**
 * What a file says of its identity, or null if there is no such file or it is none.
 *
 * `{ file, name, placeholder, classWord, family, steps, date, ofFile, picture }`: all texts are as
 * in the file, and may be anything; `picture` is a data URL or "", `date` a Date or null, which
 * is that of the file itself where `ofFile`.
 */
export async function identityOf(file) {
    const modified = (await identityFiles()).find((entry) => entry.file === file)?.modified ?? 0
    const known = identities.get(file)
    if (known?.modified === modified) return known.identity
    const identity = readIdentity(file, modified)
    identities.set(file, { modified, identity })
    if (!(await identity)) identities.delete(file) // asked for again: it may have been a bad moment
    return identity
}

/** All identities of the library whose placeholders can stand in a prompt. */
export async function library() {
    const files = [...(await identityFiles(FRESH_MILLISECONDS))]
    const found = []
    const work = async () => {
        while (files.length) found.push(await identityOf(files.shift().file))
    }
    await Promise.all(Array.from({ length: AT_ONCE }, work))
    return found.filter((identity) => isName(identity?.name))
}

/** The metadata of a checkpoint or another model file, or null; it is read once. */
export function metadataOf(folder, file) {
    const key = `${folder}/${file}`
    if (!others.has(key)) others.set(key, readMetadata(folder, file))
    return others.get(key)
}

async function readMetadata(folder, file) {
    const query = new URLSearchParams({ filename: file })
    return await json(`/view_metadata/${encodeURIComponent(folder)}?${query}`)
}

async function json(path) {
    try {
        const answer = await api.fetchApi(path)
        return answer.ok ? await answer.json() : null
    } catch {
        return null // the server is away, or answers no JSON: as if there were nothing
    }
}

async function readListing() {
    const detailed = await json(`/experiment/models/${FOLDER}`)
    if (Array.isArray(detailed))
        return detailed.map(({ name, modified }) => ({ file: name, modified }))
    const names = await json(`/models/${FOLDER}`)
    return Array.isArray(names) ? names.map((file) => ({ file, modified: 0 })) : []
}

async function readIdentity(file, modified) {
    const metadata = await readMetadata(FOLDER, file)
    if (metadata?.format !== "sefi-identity") return null
    const { name = "", class_word: classWord = "", family = "" } = metadata
    const trained = new Date(metadata["modelspec.date"] ?? NaN)
    const ofFile = Number.isNaN(trained.getTime())
    const picture = metadata["modelspec.thumbnail"] ?? ""
    return {
        file,
        name,
        placeholder: `<${name}>`,
        classWord,
        family,
        steps: stepsIn(metadata.training),
        date: ofFile ? (modified ? new Date(modified * 1000) : null) : trained,
        ofFile,
        picture: PICTURE.test(picture) ? picture : "",
    }
}

function stepsIn(training) {
    try {
        // A training that was stopped has done fewer than it was set to.
        const { steps: set, steps_done: steps = set } = JSON.parse(training)
        return Number.isInteger(steps) && steps > 0 ? steps : 0
    } catch {
        return 0
    }
}
