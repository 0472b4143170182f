/** Which identities the open workflow has, and which of them a CLIP or a MODEL comes by. */
import { executionId, inputsOf, places, source, valueOf } from "./graph.js"
import { identityOf, isName } from "./library.js"

const IDENTITY = "SEFI_IDENTITY"
const TRAIN = "SeFiTrainIdentity"
const LOAD = "SeFiLoadIdentity"
/** The inputs of loaders that name their file, and its model folder. */
const LOADERS = [
    ["ckpt_name", "checkpoints"],
    ["unet_name", "diffusion_models"],
]
export const APPLY = "SeFiApplyIdentity"

/** The identities of the graph that are known before a run: `[{ name, file, classWord }]`. */
export async function identitiesOfGraph() {
    const found = places().map((place) => identityAt(place))
    const named = (await Promise.all(found)).filter((identity) => isName(identity?.name))
    return [...new Map(named.map((identity) => [identity.name, identity])).values()]
}

/**
 * The names of the identities that SeFi Apply Identity puts into a CLIP: an empty list if it is a
 * plain one, null if a run decides which they are.
 */
export async function namesInClip(place, index) {
    const names = []
    for (let at = source(place, index), left = 100; at !== null; left--) {
        if (!at?.place || !left) return null
        const { place: origin } = at
        const clips = inputsOf(origin, "CLIP")
        if (origin.node.type === APPLY) {
            const [{ index: slot }] = inputsOf(origin, IDENTITY)
            const identity = await identityAt(giverOf(source(origin, slot)))
            if (!isName(identity?.name)) return null
            names.push(identity.name.normalize("NFC"))
        }
        if (clips.length > 1) return null
        if (!clips.length) {
            // A switch of any type may hand on what it likes; a loader has no such inputs.
            return inputsOf(origin, "*").length ? null : names
        }
        at = source(origin, clips[0].index)
    }
    return names
}

/** The file that the model of a place is loaded from: `{ folder, file }`, or null if not known. */
export function checkpointOf(place) {
    for (let left = 100; left; left--) {
        const models = inputsOf(place, "MODEL")
        if (!models.length) break
        if (models.length > 1) return null
        const at = source(place, models[0].index)
        if (!at?.place) return null
        place = at.place
    }
    for (const [name, folder] of LOADERS) {
        const file = valueOf(place, name)
        if (typeof file === "string") return { folder, file }
    }
    return null
}

/** The places of SeFi Apply Identity that the identity of a SeFi Load Identity goes to. */
export function appliersOf(node) {
    return places().filter((place) => {
        if (place.node.type !== APPLY) return false
        return giverOf(source(place, inputsOf(place, IDENTITY)[0]?.index))?.node === node
    })
}

/** The first of a node's places: itself, and which subgraphs it is in; null if it is not used. */
export function placeOf(node) {
    return places().find((place) => place.node === node) ?? null
}

/** The place whose id a run's events name, or null. */
export function placeWithId(id) {
    return places().find((place) => executionId(place) === String(id)) ?? null
}

/** Through SeFi Save Identity and others that hand an identity on, to where it comes from. */
function giverOf(at) {
    for (let left = 100; at?.place && left; left--) {
        if ([TRAIN, LOAD].includes(at.place.node.type)) return at.place
        const inputs = inputsOf(at.place, IDENTITY)
        if (inputs.length !== 1) return null
        at = source(at.place, inputs[0].index)
    }
    return null
}

async function identityAt(place) {
    if (place?.node.type === TRAIN)
        return { name: valueOf(place, "name"), classWord: valueOf(place, "class_word"), file: "" }
    if (place?.node.type !== LOAD) return null
    const [file, name] = [valueOf(place, "file"), valueOf(place, "name")]
    if (typeof file !== "string") return null
    const identity = await identityOf(file)
    if (name === undefined && placeHasInput(place, "name")) return null
    return identity && { ...identity, name: name || identity.name }
}

function placeHasInput({ node }, name) {
    return node.inputs?.some((input) => input.widget?.name === name && input.link != null) ?? false
}
